"""Other people's models and other people's formats."""
