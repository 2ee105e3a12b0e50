"""HDF5 files, sharded over ranks: written whole or not at all, and read with care."""
