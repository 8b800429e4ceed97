"""The same functions, faster: each form is proved equal to the plain one, and is opt-in."""
