"""Side-by-side measurements. Each prints ratios that were taken in one run: absolute times hold for one machine and
one hour, a ratio between two programs that took turns on the same cores holds for longer."""
