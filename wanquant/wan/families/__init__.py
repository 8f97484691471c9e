"""Families of video models: Wan's own, and others whose transformers, pipelines and VAEs diffusers has."""

from wanquant.wan.families.family import FOLDS as FOLDS
from wanquant.wan.families.family import PICTURE_TOKENS as PICTURE_TOKENS
from wanquant.wan.families.family import Family as Family
from wanquant.wan.families.family import Text as Text
from wanquant.wan.families.registry import FAMILIES as FAMILIES
from wanquant.wan.families.registry import WAN as WAN
from wanquant.wan.families.registry import block_names as block_names
from wanquant.wan.families.registry import block_of as block_of
from wanquant.wan.families.registry import family_of as family_of
from wanquant.wan.families.registry import family_of_pipe as family_of_pipe
from wanquant.wan.families.registry import folds_of as folds_of
from wanquant.wan.families.registry import register_family as register_family
