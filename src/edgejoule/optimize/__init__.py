"""Passes: what changes a network before it is compiled. ``LEAVES`` lists them: a new pass is a file and a line here.

Host only. A pass takes a module and its spec and returns new ones; it never changes what it was given.
"""

LEAVES = {
    "fuse": "edgejoule.optimize.fuse:Fuse",
    "resize": "edgejoule.optimize.resize:Resize",
    "window_attention": "edgejoule.optimize.window_attention:WindowAttention",
    "distill": "edgejoule.optimize.distill:Distill",
    "finetune": "edgejoule.optimize.finetune:Finetune",
}
