"""Passes: what changes a network before it is compiled. ``LEAVES`` lists them: a new pass is a file and a line here.

Host only. A pass takes a module and its spec and returns new ones; it never changes what it was given.
"""

LEAVES = {
    "fuse": "edgejoule.optimize.fuse:Fuse",
    "resize": "edgejoule.optimize.resize:Resize",
    "window_attention": "edgejoule.optimize.window_attention:WindowAttention",
    "prune_heads": "edgejoule.optimize.prune_heads:PruneHeads",
    "prune_ffn": "edgejoule.optimize.prune_ffn:PruneFfn",
    "prune_weights": "edgejoule.optimize.prune_weights:PruneWeights",
    "merge_tokens": "edgejoule.optimize.merge_tokens:MergeTokens",
    "prune_tokens": "edgejoule.optimize.prune_tokens:PruneTokens",
    "distill": "edgejoule.optimize.distill:Distill",
    "finetune": "edgejoule.optimize.finetune:Finetune",
    "qat": "edgejoule.optimize.qat:Qat",
}
