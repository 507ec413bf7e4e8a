"""Order (plan), data sets (sources), augmentation (transforms) and delivery (loader)."""
