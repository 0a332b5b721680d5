"""Small video files whose frames say their own number, for the tests of reading."""

from pathlib import Path

import cv2
import numpy as np

RED, BLUE = (220, 40, 30), (30, 60, 220)


def draw(frames: int, height: int = 64, width: int = 64) -> np.ndarray:
    """(F, H, W, 3) RGB: the upper part shows the frame number in binary, the lower is red or blue.

    The lower left is red and the lower right blue, so that swapped channels are seen.
    """
    image_FHW3 = np.zeros((frames, height, width, 3), np.uint8)
    half = height // 2
    image_FHW3[:, half:, : width // 2], image_FHW3[:, half:, width // 2 :] = RED, BLUE
    for number, image_HW3 in enumerate(image_FHW3):
        for bit in range(8):
            if number >> bit & 1:
                image_HW3[:half, bit * width // 8 : (bit + 1) * width // 8] = 255
    return image_FHW3


def numbers(image_nHW3: np.ndarray) -> list[int]:
    """The frame numbers that pictures of `draw` show."""
    height, width = image_nHW3.shape[1:3]
    middle = [(2 * bit + 1) * width // 16 for bit in range(8)]
    bits_n8 = image_nHW3[:, height // 4, middle].mean(axis=-1) > 128
    return [int(value) for value in bits_n8 @ (1 << np.arange(8))]


def write_opencv(path: Path, image_FHW3: np.ndarray, code: str = "mp4v") -> Path:
    """Write a file with OpenCV: "mp4v" for .mp4, "MJPG" or "XVID" for .avi."""
    path.parent.mkdir(parents=True, exist_ok=True)
    height, width = image_FHW3.shape[1:3]
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter_fourcc(*code), 8, (width, height))
    assert writer.isOpened(), path
    for image_HW3 in image_FHW3:
        writer.write(cv2.cvtColor(image_HW3, cv2.COLOR_RGB2BGR))
    writer.release()
    return path


def write_pyav(
    path: Path, image_FHW3: np.ndarray, codec: str = "libx264", container: dict | None = None
) -> Path:
    """Write a file with PyAV; H.264 gets B-frames and a key frame every 12 frames."""
    import av

    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w", options=container or {}) as file:
        stream = file.add_stream(codec, rate=24)
        stream.height, stream.width = image_FHW3.shape[1:3]
        stream.pix_fmt = "yuv420p"
        stream.options = {"bf": "3", "g": "12"} if codec == "libx264" else {}
        for image_HW3 in image_FHW3:
            file.mux(stream.encode(av.VideoFrame.from_ndarray(image_HW3, format="rgb24")))
        file.mux(stream.encode())
    return path


def write_folder(path: Path, image_FHW3: np.ndarray, template: str = "img_{:05d}.jpg") -> Path:
    """Write one picture for each frame, numbered from 1."""
    path.mkdir(parents=True, exist_ok=True)
    for number, image_HW3 in enumerate(image_FHW3, start=1):
        bgr = cv2.cvtColor(image_HW3, cv2.COLOR_RGB2BGR)
        assert cv2.imwrite(str(path / template.format(number)), bgr)
    return path


def write_flow(path: Path, flow_FHW2: np.ndarray, template: str = "flow_{}_{:05d}.png") -> Path:
    """Write the two components of uint8 flow as grey pictures, numbered from 1."""
    for axis, name in enumerate("xy"):
        for number, flow_HW2 in enumerate(flow_FHW2, start=1):
            file = path / template.format(name, number)
            file.parent.mkdir(parents=True, exist_ok=True)
            assert cv2.imwrite(str(file), flow_HW2[..., axis])
    return path
