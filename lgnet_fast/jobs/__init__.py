"""The work of commands: filling pictures, with items, journal and report; tuning; verification."""
