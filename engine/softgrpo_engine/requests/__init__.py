"""What callers ask for, and what they get of it."""
