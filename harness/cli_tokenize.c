#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <cjson/cJSON.h>

#include "harness/cli.h"
#include "harness/file.h"
#include "harness/json.h"
#include "harness/tokenizer.h"

enum { KEY_DECODE = CLI_KEY_OWN, KEY_SPECIALS, KEY_CHAT, KEY_SYSTEM, KEY_COUNT, KEY_PIECES, KEY_LEARN, KEY_SIZE, KEY_OUT };
static const size_t text_limit = (size_t)1 << 32;

typedef struct tokenize_options {
    cli_common common;
    const char *dir, *text, *system, *learn, *out;
    bool decode, specials, chat, count, pieces;
    int64_t size;
} tokenize_options;

static const struct argp_option options[] = {
    CLI_OPTIONS_HELP, CLI_OPTIONS_JSON,
    {"pieces", KEY_PIECES, 0, 0, "Print every id with its bytes", 1},
    {"count", KEY_COUNT, 0, 0, "Print how many ids only", 1},
    {"specials", KEY_SPECIALS, 0, 0, "Recognise special tokens in the text", 1},
    {"chat", KEY_CHAT, 0, 0, "The text is what the user says: render the chat template around it", 1},
    {"system", KEY_SYSTEM, "TEXT", 0, "With --chat: the system's turn before it", 1},
    {"decode", KEY_DECODE, 0, 0, "The text is ids; print what they say", 1},
    {"learn", KEY_LEARN, "FILE", 0, "Learn a vocabulary from a text file", 2},
    {"size", KEY_SIZE, "N", 0, "With --learn: its ranks, 256 or more", 2},
    {"out", KEY_OUT, "DIR", 0, "With --learn: where tiktoken.model goes", 2},
    {0}};

static error_t parse(int key, char *arg, struct argp_state *state)
{
    tokenize_options *o = state->input;
    kl_status s = kl_ok();
    switch (key) {
    case KEY_DECODE: o->decode = true; break;
    case KEY_SPECIALS: o->specials = true; break;
    case KEY_CHAT: o->chat = true; break;
    case KEY_COUNT: o->count = true; break;
    case KEY_PIECES: o->pieces = true; break;
    case KEY_SYSTEM: o->system = arg; break;
    case KEY_LEARN: o->learn = arg; break;
    case KEY_OUT: o->out = arg; break;
    case KEY_SIZE: s = cli_int("--size", arg, 256, 1 << 24, &o->size); break;
    case ARGP_KEY_ARG:
        if (!o->dir)
            o->dir = arg;
        else if (!o->text)
            o->text = arg;
        else
            s = kl_error(KL_EINVAL, "unexpected argument '%s'", arg);
        break;
    default: return cli_common_key(key, arg, &o->common);
    }
    return kl_failed(s) ? cli_fail(&o->common, s) : 0;
}

static void print_and_free(cJSON *o)
{
    char *text = cJSON_PrintUnformatted(o);
    puts(text ? text : "{}");
    cJSON_free(text);
    cJSON_Delete(o);
}

static kl_status learn(const tokenize_options *o)
{
    char *text, path[4096];
    size_t size;
    KL_REQUIRE(o->size && o->out, "--learn: expected --size N and --out DIR with it");
    KL_REQUIRE(!o->dir, "unexpected argument '%s' with --learn", o->dir);
    KL_REQUIRE(snprintf(path, sizeof path, "%s/tiktoken.model", o->out) < (int)sizeof path, "%s: path too long", o->out);
    KL_TRY(kl_file_read(o->learn, text_limit, &text, &size));
    kl_status s = kl_make_dir(o->out);
    if (!kl_failed(s))
        s = kl_error_in(kl_tokenizer_train(text, size, o->size, path), "%s", o->learn);
    free(text);
    if (kl_failed(s) || !o->common.json)
        return s;
    cJSON *root = cJSON_CreateObject();
    cJSON_AddStringToObject(root, "path", path);
    cJSON_AddNumberToObject(root, "ranks", (double)o->size);
    print_and_free(root);
    return s;
}

static kl_status read_all(char **text)
{
    size_t room = 1 << 16, used = 0, got;
    *text = malloc(room);
    while (*text && (got = fread(*text + used, 1, room - used - 1, stdin)) > 0) {
        used += got;
        if (room - used >= 2)
            continue;
        char *more = realloc(*text, room *= 2);
        if (!more)
            free(*text);
        *text = more;
    }
    if (!*text)
        return kl_error(KL_ENOMEM, "text: out of memory");
    (*text)[used] = '\0';
    if (strlen(*text) == used)
        return kl_ok();
    kl_status s = kl_error(KL_EINVAL, "text: byte %zu is NUL", strlen(*text));
    free(*text);
    return s;
}

static kl_status decode(const kl_tokenizer *t, const char *text)
{
    int32_t *ids = malloc((strlen(text) + 1) * sizeof *ids);
    int64_t count = 0;
    char *end, *out = NULL;
    size_t length = 0;
    if (!ids)
        return kl_error(KL_ENOMEM, "out of memory");
    kl_status s = kl_ok();
    while (!kl_failed(s) && *(text += strspn(text, " \t\r\n,[]"))) {
        long long id = strtoll(text, &end, 10);
        if (end == text || id < 0 || id >= kl_tokenizer_size(t) || !strchr(" \t\r\n,[]", *end))
            s = kl_error(KL_EINVAL, "ids: expected whole numbers below %lld, got '%.*s'", (long long)kl_tokenizer_size(t), (int)strcspn(text, " \t\r\n,[]"), text);
        ids[count++] = (int32_t)id;
        text = end;
    }
    if (!kl_failed(s))
        s = kl_tokenizer_decode(t, ids, count, &out, &length);
    if (!kl_failed(s))
        fwrite(out, 1, length, stdout);
    free(out);
    free(ids);
    return s;
}

static void print_piece(const char *piece, size_t size)
{
    bool whole = kl_utf8_valid(piece, size) == size;
    for (size_t i = 0; i < size; i++) {
        unsigned char c = (unsigned char)piece[i];
        if (c == '\n')
            fputs("\\n", stdout);
        else if (c < 0x20 || c == 0x7f || (c >= 0x80 && !whole))
            printf("\\x%02x", c);
        else
            putchar(c);
    }
}

static void print_json(const int32_t *ids, int64_t count)
{
    cJSON *o = cJSON_CreateObject(), *list = cJSON_AddArrayToObject(o, "ids");
    cJSON_AddNumberToObject(o, "count", (double)count);
    for (int64_t i = 0; i < count; i++)
        cJSON_AddItemToArray(list, cJSON_CreateNumber(ids[i]));
    print_and_free(o);
}

static void print_ids(const tokenize_options *o, const kl_tokenizer *t, const int32_t *ids, int64_t count)
{
    if (o->common.json) {
        print_json(ids, count);
        return;
    }
    if (o->count) {
        printf("%lld\n", (long long)count);
        return;
    }
    for (int64_t i = 0; i < count; i++) {
        if (!o->pieces) {
            printf("%s%d", i ? " " : "", (int)ids[i]);
            continue;
        }
        size_t size = 0;
        const char *piece = kl_tokenizer_piece(t, ids[i], &size);
        printf("%7d  ", (int)ids[i]);
        print_piece(piece ? piece : "", size);
        putchar('\n');
    }
    if (!o->pieces)
        putchar('\n');
}

static kl_status encode(const tokenize_options *o, const kl_tokenizer *t, const char *text)
{
    char *rendered = NULL;
    int32_t *ids = NULL;
    int64_t count = 0;
    if (o->chat) {
        kl_message turn[2] = {{"system", o->system}, {"user", text}};
        KL_TRY(o->system ? kl_chat_render(turn, 2, true, &rendered) : kl_chat_render(turn + 1, 1, true, &rendered));
        text = rendered;
    }
    kl_status s = kl_tokenizer_encode(t, text, strlen(text), o->specials || o->chat, &ids, &count);
    if (!kl_failed(s))
        print_ids(o, t, ids, count);
    free(ids);
    free(rendered);
    return s;
}

kl_status cli_tokenize(const cli_line *line, int argc, char **argv)
{
    static const struct argp argp = {options, parse, "DIR [TEXT]", "Text to ids (from standard input when no text is given), and back.", 0, 0, 0};
    tokenize_options o = {0};
    kl_tokenizer *t;
    char *text = NULL;
    bool help;
    (void)line;
    KL_TRY(cli_parse(&argp, argc, argv, &o, &help));
    if (help)
        return kl_ok();
    if (o.learn)
        return learn(&o);
    KL_REQUIRE(o.dir, "expected a tokenizer's directory; '%s --help' says more", argv[0]);
    KL_REQUIRE(!o.size && !o.out, "--size, --out: expected together with --learn");
    KL_REQUIRE(!o.system || o.chat, "--system: expected together with --chat");
    KL_TRY(kl_tokenizer_open(&t, o.dir));
    kl_status s = o.text ? kl_ok() : read_all(&text);
    if (!kl_failed(s))
        s = o.decode ? decode(t, o.text ? o.text : text) : encode(&o, t, o.text ? o.text : text);
    free(text);
    kl_tokenizer_close(t);
    return s;
}
