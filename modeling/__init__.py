"""What runs inside forward(): backbones, routing, caches, models and their remote code."""
