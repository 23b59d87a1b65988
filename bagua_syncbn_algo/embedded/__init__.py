"""The embedded host. Importing this package patches nothing: upstream Bagua cannot be imported into a patched torch."""
