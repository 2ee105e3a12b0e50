"""What the Numba backend is made of: vector code, products, tiles, threads."""
