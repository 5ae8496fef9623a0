"""An adapter as files: PEFT's folder, other programs' files, the hub.

In: a folder, a file or a hub id. Out: the adapter's config and tensors, placed on a model; and the way back.
Uses: errors, door, results, tensors, kinds, contract, forward, model, formats.
"""

from adapterkit.files.folder import (
    PICKLE_FILE,
    WEIGHTS_FILE,
    WEIGHTS_FILES,
    local_path,
    read,
    read_config,
    standing,
)
from adapterkit.files.hub import adapter_folder, hub_error, hub_id, hub_is_unreachable, model_folder
from adapterkit.files.load import EVERYWHERE, load_adapter
from adapterkit.files.match import check_tensors, file_places, match_adapter, refuse, same_values, warn_of_misfit
from adapterkit.files.save import adapter_tensors, file_config, file_contents, file_tensors, save_adapter, short_names
from adapterkit.files.serving import ServerName, ServingReport, check_serving, problems_of, server_named
from adapterkit.files.swap import swap_in
from adapterkit.files.tensors import (
    Entry,
    FactorSpool,
    MappedFiles,
    Shard,
    as_bytes,
    dtype_name,
    read_entry,
    read_header,
    read_tensors,
    write_header,
    write_tensors,
)
from adapterkit.files.writing import appearing, new_folder, write_folder
