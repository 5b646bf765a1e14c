"""Memory-augmented video-to-video diffusion: edits of one video that agree with each other."""

from mv2v_engine.camera.trajectories import CameraTrajectory
from mv2v_engine.config import EngineConfig
from mv2v_engine.engine.engine import Engine
from mv2v_engine.engine.session import Session
from mv2v_engine.engine.turn import Turn
from mv2v_engine.progress import CancelToken

__version__ = "0.1.0"

__all__ = [
    "CameraTrajectory",
    "CancelToken",
    "Engine",
    "EngineConfig",
    "Session",
    "Turn",
    "__version__",
]
