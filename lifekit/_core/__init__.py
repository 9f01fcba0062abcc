"""What lifekit is: declarations, the plan, the engine, lifespans. It imports no other part."""
