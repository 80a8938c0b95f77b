/* What the files that make, map and write parameters share. */
#ifndef KL_HARNESS_WEIGHTS_LIST_H
#define KL_HARNESS_WEIGHTS_LIST_H

#include "harness/weights.h"

typedef struct kl_weights_item {
    kl_param *param;
    kl_param_info info;
    char name[128]; /* what info.name points at */
} kl_weights_item;

/* Every parameter in the order of kl_weights_each; free(items). */
typedef struct kl_weights_list {
    kl_weights_item *items;
    size_t count;
} kl_weights_list;
kl_status kl_weights_list_make(kl_weights_list *list, const kl_config *c, kl_weights *w);

/* A_log, dt_bias and the choice bias are float whatever the model's dtype. */
static inline bool kl_param_always_f32(const kl_param_info *info)
{
    return info->init_kind == KL_INIT_A_LOG || info->init_kind == KL_INIT_DT_BIAS || !info->trained;
}

/* Layers and experts without data. On failure kl_weights_free what is there. */
kl_status kl_weights_frame(kl_weights *w, const kl_config *c);
/* Once all data pointers stand: the tied head, the experts' pointer tables. */
void kl_weights_finish(kl_weights *w, const kl_config *c);

#endif
