"""SDXL's noise schedule for tests."""

from diffusers import DDPMScheduler

from sdxl_ambient.noise import NoiseSchedule

SDXL = dict(num_train_timesteps=1000, beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")


def sdxl(prediction_type="epsilon"):
    return NoiseSchedule.from_scheduler(DDPMScheduler(**SDXL, prediction_type=prediction_type))
