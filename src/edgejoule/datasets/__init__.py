"""Labelled data sets for dense prediction, and their scores: COCO's format with mAP, ADE20K's with mIoU.

    coco_json          a COCO annotation file, checked and typed           (no torch, no pycocotools)
    coco               images and torchvision's detection targets
    average_precision  mAP of boxes and masks, counted by pycocotools
    ade20k             images and label maps in the ADEChallengeData2016 layout
    mean_iou           a confusion matrix, mIoU and pixel accuracy
    pictures           one image file as RGB, upright

Importing this package imports none of them, and no torch. It knows no model, no training loop and no download.
"""
