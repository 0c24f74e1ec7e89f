"""What commands do over folders, shards and processes: filling pictures, the journal, the report."""
