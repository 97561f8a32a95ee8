"""Makes the embedded backbone: distils a ViT-S/14 into ``vit_mini_patch8_64`` on images that packages carry.

Stages, each cached in ``--work`` so that an interrupted run goes on where it stopped:

1. ``features``: draw seeded views of the training images and keep, for each, the student's 64-pixel input and
   the teacher's class token and patch tokens (at 112 pixels, so that both have the same 8x8 grid of patches);
2. ``distil``: train the student to predict them, through one linear head for each kind of token;
3. ``write``: the student without its heads, as float16, into the package;
4. ``evaluate``: linear probes of the written file on images that stages 1 and 2 never saw.

No labels are used before stage 4, and pictures with digits are left out of stages 1 and 2.
The data folders and how to fill them: ``docs/embedded_backbone.md``.
"""
