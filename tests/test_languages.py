"""Other languages than English: words, keywords, overlaps and repetition measure what they mean."""

import json
import unicodedata

import polars as pl
import pytest
import yaml

from resources.settings.files import load_settings
from resources.settings.sections import SettingsError
from synpo_assets.cli.preflight import check_data_and_training
from synpo_assets.method.keywords import Keywords
from synpo_assets.method.pairs import repetition
from synpo_assets.method.prompts import Contamination, NearDuplicates
from synpo_assets.method.rules import meets
from synpo_assets.method.words import words_of
from tests.conftest import synpo
from tests.nano import make_nano_model, nano_settings, write_settings

NON_JOINER = "\u200c"
# By language: a paragraph, some keywords of it, and a word of the stopword list.
PARAGRAPHS = {
    "zh": ("太阳能电池板把阳光变成电能。许多家庭可以在屋顶安装太阳能电池板以降低电费。", {"太阳能", "阳光", "屋顶"}, "把"),
    "ja": ("太陽光発電は太陽の光を電気に変える仕組みです。多くの家庭が屋根に設置しています。", {"電気に", "屋根に"}, "です"),
    "th": ("แผงโซลาร์เซลล์เปลี่ยนแสงแดดเป็นไฟฟ้า หลายครอบครัวติดตั้งบนหลังคาเพื่อลดค่าไฟ", {"แสงแดด", "ไฟฟ้า"}, "เพื่อลดค่า"),
    "hi": ("सौर पैनल सूर्य के प्रकाश को बिजली में बदलते हैं। कई परिवार छत पर पैनल लगाते हैं।", {"पैनल", "बिजली"}, "पर"),
    "ar": ("تحول الألواح الشمسية ضوء الشمس إلى كهرباء. تركب عائلات كثيرة الألواح على السطح.", {"الشمس", "كهرباء"}, "على"),
    "ko": ("태양광 패널은 햇빛을 전기로 바꿉니다. 많은 가정이 지붕에 패널을 설치합니다.", {"태양광", "햇빛을"}, "은"),
    "de": ("Solarmodule wandeln Sonnenlicht in Strom um. Viele Familien setzen sie aufs Dach.", {"sonnenlicht", "strom"}, "sie"),
}  # fmt: skip


@pytest.mark.parametrize("language", PARAGRAPHS)
def test_keywords(language):
    paragraph, expected, stopword = PARAGRAPHS[language]
    found = Keywords(language).of(paragraph, 30)
    assert expected <= set(found)
    assert stopword not in found
    assert len(found) >= 6


@pytest.mark.parametrize("language", ["lo", "km", "my"])
def test_a_language_whose_words_cannot_be_told_apart_is_refused(tmp_path, nano_model, language):
    file = write_settings(tmp_path / "mine.yaml", nano_settings(nano_model) | {"keyword_pool": {"language": language}})
    with pytest.raises(
        SettingsError, match=rf"`keyword_pool.language`: `{language}` is written without spaces.*zh, ja and th"
    ):
        load_settings(file)


@pytest.mark.parametrize(("language", "text"), [
    ("en", PARAGRAPHS["zh"][0]), ("de", PARAGRAPHS["th"][0]), ("en", "ແຜງໂຊລາປ່ຽນແສງຕາເວັນເປັນໄຟຟ້າ ຫຼາຍຄອບຄົວຕິດຕັ້ງ ເທິງຫຼັງຄາ"),
    ("bo", "ཉི་མའི་འོད་ཟེར་གློག་ཏུ་བསྒྱུར་བའི་འཕྲུལ་ཆས་ཡིན། ཁྱིམ་ཚང་མང་པོས་ཐོག་ཁར་འཇོག"),
], ids=["Chinese as English", "Thai as German", "Lao as English", "Tibetan"])  # fmt: skip
@pytest.mark.parametrize("where", ["corpus", "train"])
def test_texts_without_keywords_in_the_stated_language_are_refused(tmp_path, nano_model, language, text, where):
    rows = [{"prompt": f"{text} {number}", "answer": "So.", "text": text} for number in range(40)]
    (tmp_path / "rows.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    values = nano_settings(nano_model)
    values["keyword_pool"] = {"language": language} | ({"corpus": {"path": "rows.jsonl"}} if where == "corpus" else {})
    if where == "train":
        values["seed_data"] |= {"train": {"path": "rows.jsonl"}, "on_bad_rows": "drop"}
    settings = load_settings(write_settings(tmp_path / "mine.yaml", values))
    with pytest.raises(SettingsError, match=rf"Only 0 of .*[._]{where} have . keywords in the language `{language}`"):
        check_data_and_training(settings)


def test_a_seed_in_another_language_than_its_prompts_shall_be_in_is_refused(tmp_path, nano_model):
    values = nano_settings(nano_model)
    values["prompt_generator"]["language"] = "de"
    settings = load_settings(write_settings(tmp_path / "mine.yaml", values))
    with pytest.raises(SettingsError, match=r"prompt_generator.language is `de`, and \d+ of the first 24 prompts"):
        check_data_and_training(settings)


def test_yaml_takes_norwegian_for_a_denial(tmp_path, nano_model):
    file = tmp_path / "mine.yaml"
    file.write_text(yaml.safe_dump(nano_settings(nano_model)) + "keyword_pool: {language: no}\n")
    with pytest.raises(
        SettingsError, match=r"`keyword_pool\.language` is a word that YAML reads as False: put it in quotes"
    ):
        load_settings(file)


@pytest.mark.parametrize(("phrase", "other"), [
    ("请用一句话解释太阳能电池板怎样工作", "问"),
    ("太陽光発電の仕組みを一文で説明して", "問"),
    ("อธิบายการทำงานของแผงโซลาร์เซลล์", "ถาม"),
    ("सौर पैनल कैसे काम करते हैं एक वाक्य में समझाइए कृपया अभी", " प्रश्न"),
    ("اشرح في جملة واحدة كيف تعمل الألواح الشمسية على سطح البيت", " سؤال"),
])  # fmt: skip
def test_what_a_prompt_shares_with_another_is_found(phrase, other):
    assert Contamination([phrase], 8).find(f"{phrase}{other}") == phrase
    known = NearDuplicates(0.7)
    known.add(phrase)
    assert known.find(f"{phrase}{other}") == phrase
    assert repetition(phrase * 4 if other[0] != " " else f"{phrase} " * 4, 3) > 0.6
    assert repetition(phrase, 3) < 0.2


@pytest.mark.parametrize("form", ["NFC", "NFD"])
def test_how_an_accent_is_encoded_hides_no_shared_words(form):
    phrase = "Où est le café près d'ici, s'il vous plaît ?"
    assert Contamination([phrase], 8).find(f"Dis : {unicodedata.normalize(form, phrase)}") == phrase


def test_joiners_stand_inside_keywords():
    assert "ශ්\u200dරී" in Keywords("si").of("ශ්\u200dරී ලංකාවේ සූර්ය පැනල", 9)
    assert f"می{NON_JOINER}کنند" in Keywords("fa").of(
        f"پنل{NON_JOINER}های خورشیدی نور خورشید را به برق تبدیل می{NON_JOINER}کنند.", 9
    )


def test_words_are_whole_or_characters():
    assert words_of("हिन्दी में लिखो") == ["हिन्दी", "में", "लिखो"]
    assert words_of("কী ভাষা") == ["কী", "ভাষা"]
    assert words_of(f"می{NON_JOINER}خواهم") == ["میخواهم"]
    assert words_of("ශ්\u200dරී שלו\u200fם Sonnen\u00adlicht") == ["ශ්රී", "שלום", "sonnenlicht"]
    assert words_of("ส้ม\u200bหวาน ❤\ufe0f \u0301") == ["ส้", "ม", "ห", "ว", "า", "น"]
    assert words_of("\uff27\uff30\uff34\uff0d\uff14 ｶﾞ") == words_of("GPT-4 ガ")
    assert words_of("五つ数えて") == list("五つ数えて")
    assert meets("words_at_most", "3", "五つです。") is False
    assert meets("words_at_most", "4", "五つです。") is True


def seed_of(language, rows):
    """Questions and answers out of the sentences of a paragraph, all different."""
    words = [word for word in Keywords(language).of(PARAGRAPHS[language][0], 30) if len(word) > 1]
    gap = "" if language == "zh" else " "
    ask = {"zh": "请解释{}和{}。", "ar": "اشرح العلاقة بين {} و {} من فضلك", "de": "Erkläre bitte {} und {}."}[language]
    pairs = [(one, other) for one in words for other in words if one != other][:rows]
    return [{"prompt": ask.format(*pair), "answer": gap.join(reversed(pair)) + "."} for pair in pairs]


@pytest.mark.slow
@pytest.mark.parametrize("language", ["de", "ar", "zh"])
def test_an_iteration(tmp_path, nano_embedding_model, language):
    rows = seed_of(language, 60)
    for name, part in (("train", rows[:-8]), ("held_out", rows[-8:])):
        (tmp_path / f"{name}.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in part))
    paragraphs = [{"text": f"{PARAGRAPHS[language][0]} {row['prompt']} {row['answer']}"} for row in rows]
    (tmp_path / "corpus.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in paragraphs))
    values = nano_settings(make_nano_model(tmp_path / "nano", rows))
    values["diversity"]["embedding_model"]["name"] = str(nano_embedding_model)
    values["seed_data"] |= {name: {"path": f"{name}.jsonl"} for name in ("train", "held_out")} | {"verifiable": None}
    values["seed_data"]["on_bad_rows"] = "drop"
    values["keyword_pool"] = {"corpus": {"path": "corpus.jsonl"}, "language": language}
    # The nano model knows few words, so its prompts are alike; what matters is that every stage is made.
    values["prompt_generator"] |= {"decontamination_ngram": 12, "max_overdraw": 8, "near_duplicate_similarity": 1.0}
    # And it must have learned to write any at all.
    values["prompt_generator"]["training"] = values["prompt_generator"]["training"] | {"epochs": 4}
    values["responses"]["sampling"]["max_new_tokens"] = 96
    values["checks"] = {"min_pairs_share": 0.0}
    home = tmp_path / "home"
    result = synpo("run", "--settings", write_settings(tmp_path / "mine.yaml", values), "--home", home)
    assert result.returncode in (0, 1), result.stderr[-3000:]
    pool = pl.read_parquet(home / "tables" / "keyword_pool.parquet")
    assert pool.height >= 10
    assert (home / "checkpoints" / "model_checkpoint" / "0001.json").exists(), result.stderr[-3000:]
