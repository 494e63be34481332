"""Training: recipes as data, and one loop for one core or many GPUs. Host only; importing this package imports no torch.

    recipe    what a training recipe says: one frozen record, and how a spelling overrides it
    recipes   the table of recipes, each with its source, its cost and the result it should give
    task      the seam between the loop and what is learned: classification, detection, segmentation
    loop      the loop itself, read top to bottom

Reading order as listed; the rest serves these. Knows no zoo, no store and no study: it is given a module and a task.
"""
