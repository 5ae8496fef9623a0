"""Where people train: what tools call on a model to save and restore it, and the files of a training.

In: a call of `save_pretrained` or `load_state_dict` on an adapted model, or a tool's checkpoint. Out: the adapters,
written or restored, with everything that their training needs to go on.
Uses: errors, door, results, tensors, contract, model, formats, files, merging.
"""

from adapterkit.checkpoints.load_state_dict import StateDictHooks
from adapterkit.checkpoints.save_pretrained import Saver, WrittenElsewhere, hook_saving, subfolder, tidy, unhook_saving
from adapterkit.checkpoints.setting import check_setting, setting
from adapterkit.checkpoints.training_files import (
    STATE_FILE,
    base_state,
    load_state,
    load_states,
    restore,
    save_base_state,
    save_state,
    save_training,
)
from adapterkit.checkpoints.training_state import compact, load_training_state, training_state
