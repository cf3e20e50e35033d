"""What TensorBoard would read in the folder of a run."""

import struct

import numpy as np


def values(workdir):
    """(step, value) of all events; fails where a checksum is wrong."""
    from tensorboardX.proto.event_pb2 import Event
    from tensorboardX.record_writer import masked_crc32c

    for file in sorted((workdir / "tensorboard").iterdir()):
        content = file.read_bytes()
        while content:
            size, check = struct.unpack_from("<QI", content)
            assert check == masked_crc32c(content[:8])
            data = content[12 : 12 + size]
            assert struct.unpack_from("<I", content, 12 + size) == (masked_crc32c(data),)
            content = content[16 + size :]
            event = Event.FromString(data)
            for value in event.summary.value:
                yield event.step, value


def assert_histograms(workdir, epochs, name):
    """One of the alphas in each line of kind "epoch": `name` is as "alpha/normal"."""
    found = {step: value.histo for step, value in values(workdir) if value.tag == name}
    assert list(found) == [line["step"] for line in epochs]
    for line in epochs:
        alpha = line
        for part in name.split("/"):
            alpha = alpha[part]
        histogram, alpha = found[line["step"]], np.array(alpha)
        assert (histogram.num, sum(histogram.bucket)) == (alpha.size, alpha.size)
        of_alpha = [alpha.min(), alpha.max(), alpha.sum(), np.sum(alpha**2)]
        of_histogram = [histogram.min, histogram.max, histogram.sum, histogram.sum_squares]
        np.testing.assert_allclose(of_histogram, of_alpha, rtol=1e-5, atol=1e-9)
        # The counts of the buckets, each up to its limit.
        counts = [np.sum(alpha <= limit * (1 + 1e-12)) for limit in histogram.bucket_limit]
        assert np.cumsum(histogram.bucket).tolist() == counts


def assert_pictures(workdir, step, names):
    """These, the very files of the workdir, at a step, and no others."""
    found = [(at, value) for at, value in values(workdir) if value.HasField("image")]
    assert sorted(value.tag for _, value in found) == sorted(names)
    for at, value in found:
        assert at == step
        assert value.image.encoded_image_string == (workdir / f"{value.tag}.png").read_bytes()
