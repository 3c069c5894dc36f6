"""Studies that use the recipe and that nothing in it imports; what they found is in results/ and in docs/studies.md."""
