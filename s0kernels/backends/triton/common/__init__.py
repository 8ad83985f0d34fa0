"""What both recurrences share; it imports neither of them."""
