"""What `profiling.check` runs: for each kernel, inputs of unusual shape and value, and three ways to the answer.

* `run(inputs, through)`: the public function, with its Triton kernel where that can run.
* `eager(inputs)`: an independent run in the same precision, in plain PyTorch.
* `exact(inputs, outputs)`: the answer in float64, from the same inputs.

Inputs are dictionaries of tensors and settings, the same for all three but for device and dtype. A name of `exact` that is missing from a
run is a failure; outputs that `exact` does not name are not judged. `exact` also gets the outputs of the run that is judged. Rounding may
decide which code is nearest, so codes are judged by their distance, and what follows from the codes by the codes that the run chose.
"""

from profiling.cases import group_norm, kumaraswamy, rgb, vq
from profiling.cases.case import Case, Inputs, Outputs, to_device, to_double

__all__ = ["MODULES", "OPERATORS", "REGISTRY", "Case", "Inputs", "Outputs", "to_device", "to_double"]

# Kernel -> its cases, (name, operator, arguments) of its operators for `torch.library.opcheck`, and the module of its configurations.
REGISTRY = {
    "vq_assign": vq.assign_cases,
    "vq_update": vq.update_cases,
    "kumaraswamy": kumaraswamy.cases,
    "rgb": rgb.cases,
    "group_norm": group_norm.cases,
}
OPERATORS = {
    "vq_assign": vq.assign_operators,
    "vq_update": vq.update_operators,
    "kumaraswamy": kumaraswamy.operators,
    "rgb": rgb.operators,
    "group_norm": group_norm.operators,
}
MODULES = {
    "vq_assign": "kernels.vq.launch",
    "vq_update": "kernels.vq.launch",
    "kumaraswamy": "kernels.kumaraswamy.launch",
    "rgb": "kernels.rgb.launch",
    "group_norm": "kernels.group_norm.launch",
}
