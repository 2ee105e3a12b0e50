"""What mpiexec starts: run a command with this rank's output in a file of its own, `FOLDER/rank-NNN.txt`."""

import os
import sys

folder, *command = sys.argv[1:]
rank = os.environ.get("PMI_RANK") or os.environ.get("OMPI_COMM_WORLD_RANK") or "0"
file = os.open(os.path.join(folder, f"rank-{int(rank):03d}.txt"), os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
os.dup2(file, 1)
os.dup2(file, 2)
os.execv(sys.executable, [sys.executable, *command])
