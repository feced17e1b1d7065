"""Commands of a checkout: those of users are files here, the others are `python -m scripts.FOLDER NAME`."""
