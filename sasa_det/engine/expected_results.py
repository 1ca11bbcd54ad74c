"""Whether a run has the results that its config expects."""

import logging
from collections.abc import Mapping

from detectron2.config import CfgNode
from detectron2.evaluation import verify_results
from omegaconf import DictConfig

logger = logging.getLogger(__name__)


def verify(config: CfgNode | DictConfig, results: Mapping[str, object]) -> None:
    """Compare results with ``TEST.EXPECTED_RESULTS``, as detectron2 does.

    Args:
        config: of the run.
        results: of its evaluations.

    Raises:
        SystemExit: with the status 1 if they differ; the log says so in its last line.
    """
    try:
        verify_results(config, results)
    except SystemExit:
        # Behind what detectron2 logs: all that was expected and found.
        logger.error("The results are not those that TEST.EXPECTED_RESULTS names.")
        raise
