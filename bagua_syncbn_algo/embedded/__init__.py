"""The embedded host. Importing the package itself patches nothing: upstream would refuse to be imported after that."""
