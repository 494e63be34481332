"""Labelled data sets. For classification, leaves of one seam (seams.LabelledData); for dense prediction, sets with their scores.

    split              which images train, validate and test: by hash, stable
    labelled           a split of a source, one image as upright RGB
    digits             scikit-learn's scans, offline: the default
    cifar10            the original binary files
    imagefolder        one folder a class, as ImageNet has
    huggingface        what ``datasets`` reads, from disk or from the hub
    webdataset         local tar shards
    shards             the headers of one of them
    coco_set           a folder in COCO's layout: the leaf
    ade20k_set         a folder in ADE20K's layout: the leaf
    coco_json          a COCO annotation file, checked and typed           (no torch, no pycocotools)
    coco               images and torchvision's detection targets
    average_precision  mAP of boxes and masks, counted by pycocotools
    ade20k             images and label maps in the ADEChallengeData2016 layout
    mean_iou           a confusion matrix, mIoU and pixel accuracy
    pictures           one image file as RGB, upright

Importing this package imports none of them, and no torch. It knows no model, no training loop and no download.
"""

LEAVES = {
    "digits": "edgejoule.datasets.digits:Digits",
    "cifar10": "edgejoule.datasets.cifar10:Cifar10",
    "imagefolder": "edgejoule.datasets.imagefolder:ImageFolder",
    "huggingface": "edgejoule.datasets.huggingface:HuggingFace",
    "webdataset": "edgejoule.datasets.webdataset:WebDataset",
    "coco": "edgejoule.datasets.coco_set:CocoSet",
    "ade20k": "edgejoule.datasets.ade20k_set:Ade20kSet",
}
