"""The work of commands on folders, shards and processes: filling pictures, the journal, the report."""
