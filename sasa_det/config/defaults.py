"""Every config key that sasa_det adds to detectron2's defaults."""

from detectron2.config import CfgNode

from ..data.images import MAX_PIXELS

__all__ = ["add_sasa_config"]


def add_sasa_config(cfg: CfgNode) -> None:
    """Add sasa_det's keys with their defaults, a fully attentional model, to a config.

    Depth, norm and out features of attention ResNets stay in ``MODEL.RESNETS``.

    Args:
        cfg: a detectron2 config, changed in place.
    """
    sasa = cfg.MODEL.SASA = CfgNode()
    # Stem of the backbone: "attention" (Section 3.2) or "convolution" (7x7 and max pool).
    sasa.STEM = "attention"
    # Stages whose 3x3 convolutions become attention; any of res2, res3, res4, res5 (Table 3).
    sasa.ATTENTION_STAGES = ["res2", "res3", "res4", "res5"]
    # Odd extent k of the attention window, in backbone, FPN and heads (Table 4).
    sasa.KERNEL_SIZE = 7
    # Attention heads of every layer outside the stem; heads must be of even width.
    sasa.NUM_HEADS = 8
    # Position in attention: "relative", "absolute" (sinusoidal) or "none" (Table 5).
    sasa.POSITION = "relative"
    # Whether logits hold q.k beside q.r; False drops the key projection (Table 6).
    sasa.CONTENT = True
    # Neighbours outside the image: "mask" leaves them out, "zero" makes them zero keys and values.
    sasa.BORDER = "mask"
    # Attention heads of the stem.
    sasa.STEM_HEADS = 4
    # Values of the stem: "mixture" (spatially aware), "pointwise" or "convolution" (Table 7).
    sasa.STEM_VALUES = "mixture"
    # Number of value matrices the stem mixes (M of equation 8).
    sasa.STEM_MIXTURES = 4
    # Whether the stem's logits hold q.r; the paper's FLOPs do, its equation 7 does not.
    sasa.STEM_RELATIVE = True
    # Factor on the width of every backbone layer, stem included (Figure 5).
    sasa.WIDTH_MULTIPLIER = 1.0
    # Scale that the residual branches of the backbone start with, as the weight of their last norm;
    # 0 makes every block its shortcut to begin with.
    sasa.RESIDUAL_INIT = 1.0
    # 3x3 convolutions of the FPN, and P6 and P7: "attention" or "convolution".
    sasa.FPN = "attention"
    # Feature that P6 is made from: "p5" as the paper's FLOPs say, or "res5".
    sasa.TOP_BLOCK_IN_FEATURE = "p5"
    # RetinaNet's towers and prediction layers: "attention" or "convolution".
    sasa.HEAD = "attention"
    # Whether a pointwise layer of the tower's width mixes the heads of the prediction layers
    # before the pointwise layer that produces the outputs, which mixes them as well.
    sasa.HEAD_MIXING_LAYER = False
    # Backend of local attention, see sasa_det.ops.available_backends(); "" takes the fastest.
    sasa.BACKEND = ""

    san = cfg.MODEL.SAN = CfgNode()
    # Self-attention of build_san_backbone: "pairwise" or "patchwise".
    san.ATTENTION = "pairwise"
    # 10, 15 or 19.
    san.DEPTH = 10
    # Norm of the backbone, in blocks and in attention; batch norms of any kind, or "" for none.
    san.NORM = "BN"
    # Features to return: any of stem, res2, res3, res4, res5 and, for a classifier, linear.
    san.OUT_FEATURES = ["res2", "res3", "res4", "res5"]
    # How pixels are compared. Pairwise: "subtraction", "summation", "concatenation",
    # "hadamard_product" or "dot_product"; patchwise: "concatenation", "star_product" or
    # "clique_product". "" takes the first of them, which is that of the paper's models.
    san.RELATION = ""
    # Side in pixels of the image over which the positions of pairwise attention run from -1 to 1,
    # whatever the side of the image at hand; 0 for the latter, as published. For detection, the
    # side of the images of pretraining.
    san.POSITION_SIZE = 0

    classifier = cfg.MODEL.CLASSIFIER = CfgNode()
    # Classes of an image classifier.
    classifier.NUM_CLASSES = 1000
    # Share of a label that is spread evenly over all classes.
    classifier.LABEL_SMOOTHING = 0.0
    # Share of the running statistics that every step of batch norms keeps, 1 - momentum in
    # PyTorch's terms (0.9999 in appendix A.2); 0 leaves it at detectron2's, 0.9.
    cfg.MODEL.BN_DECAY = 0.0

    # Shell patterns of the model's weights that MODEL.WEIGHTS may lack or have in another shape,
    # as in ["head.cls_score.*"]. A backbone's file may lack all outside the backbone anyway.
    cfg.MODEL.WEIGHTS_ALLOW = []

    # Multiscale jitter and a crop of fixed size, in place of resizing (appendix A.3).
    jitter = cfg.INPUT.JITTER = CfgNode()
    # Whether to train on jittered crops; evaluation resizes as usual.
    jitter.ENABLED = False
    # Smallest scale, as a factor on the largest size that fits into the crop.
    jitter.MIN_SCALE = 0.8
    # Largest scale.
    jitter.MAX_SCALE = 1.2
    # Side of the square crop in pixels.
    jitter.CROP_SIZE = 640

    # Largest product of height and width of an image; one of more is refused before it is decoded.
    cfg.INPUT.MAX_PIXELS = MAX_PIXELS
    # Different images that training may skip because they cannot be read, each of them logged; the
    # next one ends the run. 0 skips none. Evaluation of a detector never skips an image.
    cfg.DATALOADER.SKIP_UNREADABLE = 0
    # The same as a fraction of the training images; the larger number counts.
    cfg.DATALOADER.SKIP_UNREADABLE_FRACTION = 0.0

    # What an image classifier sees of an image.
    classification = cfg.INPUT.CLASSIFICATION = CfgNode()
    # Side of the square input in pixels, in training and testing.
    classification.CROP_SIZE = 224
    # Smallest part of an image's area that training cuts out at random and scales to that size.
    classification.MIN_AREA = 0.08
    # Shorter side that images are scaled to in testing, before the centre is cut out.
    classification.RESIZE_TEST = 256

    # COCO-format json to train on, in place of DATASETS.TRAIN.
    cfg.DATASETS.TRAIN_JSON = ""
    # The folder of its images.
    cfg.DATASETS.TRAIN_IMAGES = ""
    # COCO-format json to test on, in place of DATASETS.TEST.
    cfg.DATASETS.TEST_JSON = ""
    # The folder of its images.
    cfg.DATASETS.TEST_IMAGES = ""

    # Folder of images to classify, with train/ and val/ and in each a folder a class, in place of
    # DATASETS.TRAIN and TEST.
    cfg.DATASETS.IMAGE_FOLDER = ""
    # Share of each class of DATASETS.TRAIN that is tested on in place of DATASETS.TEST and not
    # trained on, always the same images (0.04 for tuning in appendix A.2); for classifiers.
    cfg.DATASETS.HOLDOUT = 0.0

    # "SGD" with SOLVER.MOMENTUM, or "AdamW".
    cfg.SOLVER.OPTIMIZER = "SGD"
    # Weight decay of learned embeddings, which like norms are no weights of a linear map.
    cfg.SOLVER.WEIGHT_DECAY_EMBEDDING = 0.0
    # Factor on the learning rate of attention's query and key projections, and of a classifier's
    # linear layer. Under Adam, whose steps have the size of the rate, the product of the former
    # soon saturates the softmax without one, and the latter, whose inputs have one sign, goes too
    # far.
    cfg.SOLVER.LOGIT_LR_FACTOR = 1.0
    # Parts of a batch that go through the model one after the other before the optimizer steps:
    # memory is that of one part. IMS_PER_BATCH must be a multiple of it times the processes.
    cfg.SOLVER.ACCUMULATION_STEPS = 1
    # What SOLVER.AMP computes in: "float16", with a scaled loss, or "bfloat16".
    cfg.SOLVER.AMP.DTYPE = "float16"
    # Batch that BASE_LR is meant for: with another IMS_PER_BATCH it is scaled linearly. 0 turns
    # that off, and so does an override or a child config that sets BASE_LR.
    cfg.SOLVER.REFERENCE_BATCH = 0
    # Length of training in epochs, in place of MAX_ITER in iterations; 0 leaves it to that.
    cfg.SOLVER.MAX_EPOCHS = 0.0
    # The same in place of WARMUP_ITERS.
    cfg.SOLVER.WARMUP_EPOCHS = 0.0
    # The same in place of CHECKPOINT_PERIOD.
    cfg.SOLVER.CHECKPOINT_EPOCHS = 0.0
    # The same in place of STEPS.
    cfg.SOLVER.STEP_EPOCHS = ()
    # The same in place of EVAL_PERIOD.
    cfg.TEST.EVAL_EPOCHS = 0.0
    # Periodic checkpoints to keep, the newest ones; 0 keeps all.
    cfg.SOLVER.MAX_CHECKPOINTS = 0

    cfg.MODEL.EMA = CfgNode()
    # Decay of the moving average of the weights, which is evaluated beside them; 0 for none.
    cfg.MODEL.EMA.DECAY = 0.0
    # Stages of the backbone that are computed again in the backward pass to save memory.
    cfg.MODEL.ACTIVATION_CHECKPOINTING = []
    # Whether weights are stored channels last, which suits convolutions on GPUs.
    cfg.MODEL.CHANNELS_LAST = False
    # Whether several processes hold a shard each of parameters, gradients and optimizer state, by
    # FSDP2, in place of copies, by DDP; it takes less memory and more time. It has been run with
    # gloo on CPUs only.
    cfg.MODEL.FSDP = False
    # Whether backbone and head go through torch.compile.
    cfg.MODEL.COMPILE = False

    # Images that a classifier is tested on at once, in each process.
    cfg.TEST.IMS_PER_BATCH = 64
    # Whether evaluation computes the losses on DATASETS.TEST as well.
    cfg.TEST.VALIDATION_LOSS = False
    # Metric whose best value is kept as model_best.pth, as in "bbox/AP" or "ema/bbox/AP"; "" keeps
    # none.
    cfg.TEST.BEST_METRIC = ""
    # Whether the best value is the largest, "max", or the smallest, "min".
    cfg.TEST.BEST_MODE = "max"
    # Evaluations without a better value after which training stops; 0 never stops it.
    cfg.TEST.EARLY_STOPPING = 0

    # Project of Weights & Biases to log to, if wandb is installed; "" for none.
    cfg.WANDB_PROJECT = ""
