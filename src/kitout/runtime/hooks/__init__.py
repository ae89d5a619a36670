"""How our code comes to run at a frozen module."""
