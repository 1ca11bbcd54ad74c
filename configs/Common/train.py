"""Options of a run; sasa_det/config/defaults.py describes the keys under their yaml names."""

train = dict(
    output_dir="./output",
    init_checkpoint="",  # weights to start from, or to evaluate
    weights_allow=[],
    seed=-1,
    device="cuda",
    max_iter=90000,
    max_epochs=0.0,  # replaces max_iter if above 0, as do the other lengths in epochs
    reference_batch=0,  # batch size that optimizer.lr is meant for; 0 for any
    accumulation_steps=1,
    amp=dict(enabled=False, dtype="float16"),
    clip_gradients=dict(enabled=False, clip_type="value", clip_value=1.0, norm_type=2.0),
    ema=dict(decay=0.0),
    activation_checkpointing=[],
    channels_last=False,
    fsdp=False,
    compile=False,
    cudnn_benchmark=False,
    ddp=dict(broadcast_buffers=False, find_unused_parameters=False, fp16_compression=False),
    checkpointer=dict(period=5000, max_to_keep=100),
    checkpoint_epochs=0.0,
    log_period=20,
    eval_period=0,
    eval_epochs=0.0,
    validation_loss=False,
    best_metric="",
    best_mode="max",
    early_stopping=0,
    precise_bn=dict(enabled=False, num_iter=200),
    wandb_project="",
)
