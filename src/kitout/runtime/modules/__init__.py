"""What one module does under a route."""
