"""The web: the application, what guards it, its routes and its page."""
