"""The mathematics of flow maps, on callables ``u(z, r, t)``; it knows no network and no trainer.

Conventions, everywhere in this package:

- t = 1 is noise, t = 0 is data, r <= t; times are fp32 ``[B]``, and t - r is taken before any cast.
- z_t = (1 - t) x + t e with data x and noise e ~ N(0, I), all ``[B, C, H, W]``.
- v = e - x is the conditional velocity dz/dt.
- u(z_t, r, t) is the average velocity over [r, t]: z_r = z_t - (t - r) u(z_t, r, t); u(z, t, t) is the velocity itself.
"""
