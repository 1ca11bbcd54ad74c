"""Every config key that sasa_det adds to detectron2's defaults."""

from detectron2.config import CfgNode, get_cfg

from ..data.images import MAX_PIXELS
from ..errors import UsageError


def default_config() -> CfgNode:
    """Return a new config with the defaults of detectron2 and of this project."""
    cfg = get_cfg()
    add_sasa_config(cfg)
    return cfg


def check_has_keys(cfg: CfgNode) -> None:
    """Raise UsageError unless a config has sasa_det's keys."""
    if "SASA" not in cfg.MODEL:
        raise UsageError(
            "the config has no MODEL.SASA: make it with sasa_det.get_cfg(), or call "
            "sasa_det.add_sasa_config(cfg) before a config file is merged into it."
        )


def add_sasa_config(cfg: CfgNode) -> None:
    """Add sasa_det's keys with their defaults, a fully attentional model, to a config.

    Depth, norm and out features of attention ResNets stay in ``MODEL.RESNETS``.

    Args:
        cfg: a detectron2 config, changed in place.
    """
    sasa = cfg.MODEL.SASA = CfgNode()
    # Stem of the backbone: "attention" (Section 3.2) or "convolution" (7x7 and max pooling).
    sasa.STEM = "attention"
    # Stages whose 3x3 convolutions are replaced by attention, any of res2, res3, res4 and res5
    # (Table 3).
    sasa.ATTENTION_STAGES = ["res2", "res3", "res4", "res5"]
    # Size k of the attention window in the backbone, the FPN and the heads; it must be odd (Table
    # 4).
    sasa.KERNEL_SIZE = 7
    # Number of attention heads of every layer outside the stem. The channels per head must be even.
    sasa.NUM_HEADS = 8
    # Position embeddings: "relative", "absolute" (sinusoidal) or "none" (Table 5).
    sasa.POSITION = "relative"
    # Whether the logits contain q.k in addition to q.r; False removes the key projection (Table 6).
    sasa.CONTENT = True
    # Norm of queries and keys outside the stem, which keeps q.k small: "BN", "RMS" (each head
    # is divided by its root mean square and has learned scales), "cosine" (q.k is a cosine times a
    # learned temperature of each head) or "" for none, as in equation 3. q.r has the normalized
    # query as well.
    sasa.QK_NORM = ""
    # Whether the logits outside the stem are multiplied by 1 / sqrt(d), d being the channels per
    # head. Equation 3 does not.
    sasa.SCALE_LOGITS = False
    # Neighbours outside the image: "mask" leaves them out of the softmax, "zero" gives them keys
    # and values of zero.
    sasa.BORDER = "mask"
    # Number of attention heads of the stem.
    sasa.STEM_HEADS = 4
    # Value transformation of the stem: "mixture" (spatially aware), "pointwise" or "convolution"
    # (Table 7).
    sasa.STEM_VALUES = "mixture"
    # Number of value matrices that the stem mixes (M in equation 8).
    sasa.STEM_MIXTURES = 4
    # Whether the logits of the stem contain q.r. The FLOPs in the paper include it, equation 7 does
    # not.
    sasa.STEM_RELATIVE = True
    # Factor by which the width of every backbone layer, including the stem, is multiplied (Figure
    # 5).
    sasa.WIDTH_MULTIPLIER = 1.0
    # Initial scale of the residual branches of the backbone, which is the weight of their last
    # norm. With 0, every block is initialized to its shortcut.
    sasa.RESIDUAL_INIT = 1.0
    # What the 3x3 convolutions of the FPN, and P6 and P7, are: "attention" or "convolution".
    sasa.FPN = "attention"
    # Feature that P6 is computed from: "p5", which agrees with the FLOPs in the paper, or "res5".
    sasa.TOP_BLOCK_IN_FEATURE = "p5"
    # What the towers and prediction layers of RetinaNet are: "attention" or "convolution".
    sasa.HEAD = "attention"
    # Whether each prediction layer has another pointwise layer, of the width of the tower, that
    # mixes the attention heads before the pointwise layer that produces the outputs.
    sasa.HEAD_MIXING_LAYER = False
    # For MODEL.BACKBONE.NAME "build_other_backbone_with_sasa_resnet": the registered backbone of
    # another project, such as its FPN, whose ResNet is replaced by the attention ResNet.
    sasa.BUILDER = ""
    # Backend of local attention, one of sasa_det.ops.available_backends(); "" selects the fastest.
    sasa.BACKEND = ""

    san = cfg.MODEL.SAN = CfgNode()
    # Type of self-attention in build_san_backbone: "pairwise" or "patchwise".
    san.ATTENTION = "pairwise"
    # Depth of the backbone: 10, 15 or 19.
    san.DEPTH = 10
    # Factor by which the width of every layer of the backbone is multiplied, a multiple of 0.25. It
    # is 1 in the models of the paper.
    san.WIDTH_MULTIPLIER = 1.0
    # Norm in the blocks and in the attention of the backbone: any kind of batch norm, or "" for
    # none.
    san.NORM = "BN"
    # Output features: any of stem, res2, res3, res4, res5 and, for a classifier, linear.
    san.OUT_FEATURES = ["res2", "res3", "res4", "res5"]
    # How pixels are compared. Pairwise: "subtraction", "summation", "concatenation",
    # "hadamard_product" or "dot_product"; patchwise: "concatenation", "star_product" or
    # "clique_product". "" selects the first of them, which the models of the paper use.
    san.RELATION = ""
    # Image size in pixels over which the positions of pairwise attention range from -1 to 1,
    # regardless of the size of the actual image. For detection, set it to the image size of
    # pretraining. 0 selects the size of the actual image, as in the published models.
    san.POSITION_SIZE = 0

    classifier = cfg.MODEL.CLASSIFIER = CfgNode()
    # Number of classes of the image classifier.
    classifier.NUM_CLASSES = 1000
    # Label smoothing: the share of a label that is distributed evenly over all classes.
    classifier.LABEL_SMOOTHING = 0.0
    # Decay of the running statistics of batch norms, which is 1 - momentum in PyTorch's terms
    # (0.9999 in appendix A.2). 0 keeps detectron2's decay of 0.9.
    cfg.MODEL.BN_DECAY = 0.0

    # Shell patterns of the names of weights that may be missing in MODEL.WEIGHTS or have another
    # shape there, for example ["head.cls_score.*"]. A file with the weights of a backbone needs no
    # patterns for the weights outside of the backbone.
    cfg.MODEL.WEIGHTS_ALLOW = []

    # Multiscale jitter and a crop of fixed size, instead of resizing (appendix A.3).
    jitter = cfg.INPUT.JITTER = CfgNode()
    # Whether to train on jittered crops. Evaluation resizes the images as usual.
    jitter.ENABLED = False
    # Minimum scale, relative to the largest size that fits into the crop.
    jitter.MIN_SCALE = 0.8
    # Maximum scale, relative to the same size.
    jitter.MAX_SCALE = 1.2
    # Size of the square crop in pixels.
    jitter.CROP_SIZE = 640
    # Minimum fraction of a box's area that lies in the crop, for its object to be one of the crop.
    # With 0, as in detectron2, a strip of one pixel is enough, and detectors of many small objects
    # learn to find objects along borders.
    jitter.MIN_VISIBLE = 0.0
    # Brightness, contrast and, of RGB images, saturation are multiplied by factors drawn from
    # 1 - COLOR to 1 + COLOR.
    jitter.COLOR = 0.0

    # Maximum number of pixels (height times width) of an image. A larger image is refused before it
    # is decoded.
    cfg.INPUT.MAX_PIXELS = MAX_PIXELS
    # Maximum number of different images that training may skip because they cannot be read. Each of
    # them is logged, and one more ends the run. Evaluation of a detector never skips an image.
    cfg.DATALOADER.SKIP_UNREADABLE = 0
    # The same as a fraction of the training images; the larger of the two limits applies.
    cfg.DATALOADER.SKIP_UNREADABLE_FRACTION = 0.0

    # Crops of the images for an image classifier.
    classification = cfg.INPUT.CLASSIFICATION = CfgNode()
    # Size of the square input in pixels, in training and evaluation.
    classification.CROP_SIZE = 224
    # Minimum area of the random crop that is resized to this size in training, as a fraction of the
    # area of the image.
    classification.MIN_AREA = 0.08
    # Size in pixels of the shorter side after resizing in evaluation, before the center crop.
    classification.RESIZE_TEST = 256

    # COCO-format json file, YOLO data.yaml or Pascal VOC folder to train on, instead of
    # DATASETS.TRAIN.
    cfg.DATASETS.TRAIN_JSON = ""
    # Folder of the images of TRAIN_JSON, or the split of a data.yaml or folder: train if empty.
    cfg.DATASETS.TRAIN_IMAGES = ""
    # COCO-format json file, YOLO data.yaml or Pascal VOC folder to evaluate on, instead of
    # DATASETS.TEST.
    cfg.DATASETS.TEST_JSON = ""
    # Folder of the images of TEST_JSON, or the split of a data.yaml or folder: val if empty.
    cfg.DATASETS.TEST_IMAGES = ""

    # Folder of images for a classifier, instead of DATASETS.TRAIN and DATASETS.TEST. It contains
    # train/ and val/, each with one folder for each class.
    cfg.DATASETS.IMAGE_FOLDER = ""
    # For classifiers: fraction of the images of each class in DATASETS.TRAIN to evaluate on,
    # instead of DATASETS.TEST, and not to train on (0.04 for tuning in appendix A.2). The images
    # are always the same.
    cfg.DATASETS.HOLDOUT = 0.0

    # Optimizer: "SGD", with SOLVER.MOMENTUM, or "AdamW".
    cfg.SOLVER.OPTIMIZER = "SGD"
    # Weight decay of the learned embeddings, which, like norms, are not weights of a linear layer.
    cfg.SOLVER.WEIGHT_DECAY_EMBEDDING = 0.0
    # Factor on the learning rate of the query and key projections of attention and of the linear
    # layer of a classifier. The step size of Adam is the learning rate. With a factor of 1, the
    # product of queries and keys soon saturates the softmax, and the steps of the linear layer,
    # whose inputs all have the same sign, add up to too much.
    cfg.SOLVER.LOGIT_LR_FACTOR = 1.0
    # The same factor for the attention stem, whose input is the image: its scale, unlike that of
    # features, does not grow. 0 uses LOGIT_LR_FACTOR.
    cfg.SOLVER.STEM_LOGIT_LR_FACTOR = 0.0
    # The same factor for the linear layer of a classifier. 0 uses LOGIT_LR_FACTOR.
    cfg.SOLVER.LINEAR_LR_FACTOR = 0.0
    # Number of iterations during which the learning rate of the query and key projections, those of
    # the stem included, rises linearly from 0 to that of the schedule.
    cfg.SOLVER.LOGIT_WARMUP_ITERS = 0
    # Weight decay of the query and key projections, those of the stem included. None uses
    # WEIGHT_DECAY.
    cfg.SOLVER.WEIGHT_DECAY_LOGIT = None
    # Gradient accumulation: number of parts of a batch that are computed one after the other before
    # a step of the optimizer. The memory needed is that of one part. IMS_PER_BATCH must be a
    # multiple of this number times the number of processes.
    cfg.SOLVER.ACCUMULATION_STEPS = 1
    # Data type of SOLVER.AMP: "float16", with gradient scaling, or "bfloat16".
    cfg.SOLVER.AMP.DTYPE = "float16"
    # Batch size that BASE_LR is meant for. With another IMS_PER_BATCH, BASE_LR is scaled linearly.
    # 0 disables this, and so does an override or a child config that sets BASE_LR.
    cfg.SOLVER.REFERENCE_BATCH = 0
    # Length of training in epochs, instead of MAX_ITER in iterations; 0 uses MAX_ITER.
    cfg.SOLVER.MAX_EPOCHS = 0.0
    # Length of the warmup in epochs, instead of WARMUP_ITERS; 0 uses WARMUP_ITERS.
    cfg.SOLVER.WARMUP_EPOCHS = 0.0
    # Epochs between two checkpoints, instead of CHECKPOINT_PERIOD; 0 uses CHECKPOINT_PERIOD.
    cfg.SOLVER.CHECKPOINT_EPOCHS = 0.0
    # Epochs at which the learning rate is decreased, instead of STEPS; () uses STEPS.
    cfg.SOLVER.STEP_EPOCHS = ()
    # Epochs between two evaluations, instead of EVAL_PERIOD; 0 uses EVAL_PERIOD.
    cfg.TEST.EVAL_EPOCHS = 0.0
    # Number of periodic checkpoints to keep, which are the newest ones; 0 keeps all of them.
    cfg.SOLVER.MAX_CHECKPOINTS = 0

    cfg.MODEL.EMA = CfgNode()
    # Decay of the exponential moving average of the weights, which is evaluated in addition to the
    # weights; 0 disables it.
    cfg.MODEL.EMA.DECAY = 0.0
    # Stages of the backbone that are computed again in the backward pass to save memory, for
    # example ["res2", "res3"].
    cfg.MODEL.ACTIVATION_CHECKPOINTING = []
    # Whether to store the weights in the channels-last memory format, which suits convolutions on
    # GPUs.
    cfg.MODEL.CHANNELS_LAST = False
    # Whether to shard the parameters, the gradients and the optimizer state among the processes
    # (FSDP2), instead of keeping a copy in each of them (DDP). This needs less memory and more
    # time. It has only been run with gloo on CPUs.
    cfg.MODEL.FSDP = False
    # Whether to compile the backbone and the heads with torch.compile.
    cfg.MODEL.COMPILE = False

    # Batch size of each process in the evaluation of a classifier.
    cfg.TEST.IMS_PER_BATCH = 64
    # Whether an evaluation also computes the losses on DATASETS.TEST.
    cfg.TEST.VALIDATION_LOSS = False
    # Metric whose best checkpoint is saved as model_best.pth, for example "bbox/AP" or
    # "ema/bbox/AP". "" saves none.
    cfg.TEST.BEST_METRIC = ""
    # Whether the best value of TEST.BEST_METRIC is the largest, "max", or the smallest, "min".
    cfg.TEST.BEST_MODE = "max"
    # Number of evaluations without a better value of TEST.BEST_METRIC after which training stops; 0
    # never stops it.
    cfg.TEST.EARLY_STOPPING = 0

    # Number of iterations between two lines of the log and of metrics.json.
    cfg.LOG_PERIOD = 20
    # Project of Weights & Biases to log to, which needs wandb to be installed; "" disables it.
    cfg.WANDB_PROJECT = ""
