"""What recovery will probably bring, from a short trial and from runs that were made to the end."""
