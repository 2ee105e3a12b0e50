"""What the library asks of MPI besides moving blocks: communicators, agreement, deadlines."""
