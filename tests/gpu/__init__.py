"""What the project does on a card, in one command and one table: ``python -m tests.gpu``."""
