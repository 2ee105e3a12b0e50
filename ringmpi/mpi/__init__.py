"""What the library needs of MPI besides moving blocks: communicators, agreement, deadlines."""
