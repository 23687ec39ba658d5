"""Pure batched tensor mathematics: no Ray, no models, no paths. Each file holds one idea."""
