"""What a number is: formats as data, a readable scalar reference, and the fast tensor functions."""
