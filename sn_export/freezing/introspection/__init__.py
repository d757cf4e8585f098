"""What a module's own code says, and what it gives when it runs on copies."""
