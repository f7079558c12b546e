"""Pictures in: reading, transforms, data sets, loaders."""
