/* What is known of a model before a weight is read: sizes, parameters, bytes, cache. */
#ifndef KL_HARNESS_INFO_H
#define KL_HARNESS_INFO_H

#include <cjson/cJSON.h>

#include "harness/config.h"

/* Cache of one sequence at one length, in bytes; all_mla: the same model with attention in every layer. */
typedef struct kl_cache_row {
    int64_t context;
    size_t kda_state, conv_tail, latents, total, all_mla;
} kl_cache_row;
kl_status kl_info_cache(const kl_config *c, int64_t context, kl_cache_row *row);

/* Bytes of the weights as stored: config->dtype, with A_log, dt_bias and the choice bias in their own types. */
kl_status kl_info_bytes(const kl_config *c, double *bytes);

/* The configuration as a JSON object, in the names of config.json where it has one. */
cJSON *kl_info_config(const kl_config *c);

/* A configuration from a directory's config.json, or from a preset, with the assignments on top. One of dir, preset must be given. */
kl_status kl_info_choose(kl_config *c, const char *dir, const char *preset, const char *const *set, int set_count);

#endif
