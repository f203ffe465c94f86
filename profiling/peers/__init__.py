"""World models of others, behind the methods by which ours is evaluated: `predict_future`, `reconstruct`."""
