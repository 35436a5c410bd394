"""What LongBench's authors published of every dataset: prompt, new tokens, metric, and how an answer ends.

The prompts are `dataset2prompt.json`'s to the letter ("asconcisely" included), and the new tokens
`dataset2maxlen.json`'s (github.com/THUDM/LongBench, MIT; arXiv:2308.14508 and, for v2, arXiv:2412.15204).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from kvcomp.benchmarks.longbench import metrics
from kvcomp.benchmarks.longbench.metrics import Metric


@dataclass(frozen=True)
class Dataset:
    """One dataset.

    prompt: with the fields of an item in braces.
    first_line: only the first line of an answer is scored.
    chat: the authors put the prompt into a model's chat template; not so for few-shot and code.
    settled: whether more text can no longer change the score of an answer; None where it always can.
    """

    prompt: str
    max_new_tokens: int
    metric: Metric
    first_line: bool = False
    chat: bool = True
    settled: Callable[[str], bool] | None = None


def _few_shot(prompt: str, max_new_tokens: int, metric: Metric) -> Dataset:
    return Dataset(prompt, max_new_tokens, metric, first_line=True, chat=False, settled=metrics.first_line_ended)


def _code(prompt: str) -> Dataset:
    return Dataset(prompt, 64, metrics.edit_similarity, chat=False, settled=metrics.code_line_ended)


_BRIEFLY = "asconcisely as you can, using a single phrase if possible. Do not provide any explanation.\n\n"
_ARTICLE = (
    "as concisely as you can, using a single phrase or sentence if possible. If the question cannot be answered "
    'based on the information in the article, write "unanswerable". If the question is a yes/no question, answer '
    '"yes", "no", or "unanswerable". Do not provide any explanation.\n\n'
)
_ONLY = "Only give me the answer and do not output any other words."
_PASSAGES = Dataset(
    f"Answer the question based on the given passages. {_ONLY}\n\nThe following are given passages.\n{{context}}\n\n"
    f"Answer the question based on the given passages. {_ONLY}\n\nQuestion: {{input}}\nAnswer:",
    32,
    metrics.f1,
)

DATASETS: dict[str, Dataset] = {
    "narrativeqa": Dataset(
        "You are given a story, which can be either a novel or a movie script, and a question. "
        f"Answer the question {_BRIEFLY}Story: {{context}}\n\n"
        f"Now, answer the question based on the story {_BRIEFLY}Question: {{input}}\n\nAnswer:",
        128,
        metrics.f1,
    ),
    "qasper": Dataset(
        f"You are given a scientific article and a question. Answer the question {_ARTICLE}"
        f"Article: {{context}}\n\n Answer the question based on the above article {_ARTICLE}"
        "Question: {input}\n\nAnswer:",
        128,
        metrics.f1,
    ),
    "multifieldqa_en": Dataset(
        "Read the following text and answer briefly.\n\n{context}\n\nNow, answer the following question based on "
        "the above text, only give me the answer and do not output any other words.\n\nQuestion: {input}\nAnswer:",
        64,
        metrics.f1,
    ),
    "multifieldqa_zh": Dataset(
        "阅读以下文字并用中文简短回答：\n\n{context}\n\n"
        "现在请基于上面的文章回答下面的问题，只告诉我答案，不要输出任何其他字词。\n\n问题：{input}\n回答：",
        64,
        metrics.f1_zh,
    ),
    "hotpotqa": _PASSAGES,
    "2wikimqa": _PASSAGES,
    "musique": _PASSAGES,
    "dureader": Dataset(
        "请基于给定的文章回答下述问题。\n\n文章：{context}\n\n请基于上述文章回答下面的问题。\n\n问题：{input}\n回答：",
        128,
        metrics.rouge_l_zh,
    ),
    "gov_report": Dataset(
        "You are given a report by a government agency. Write a one-page summary of the report.\n\n"
        "Report:\n{context}\n\nNow, write a one-page summary of the report.\n\nSummary:",
        512,
        metrics.rouge_l,
    ),
    "qmsum": Dataset(
        "You are given a meeting transcript and a query containing a question or instruction. "
        "Answer the query in one or more sentences.\n\nTranscript:\n{context}\n\n"
        "Now, answer the query based on the above meeting transcript in one or more sentences.\n\n"
        "Query: {input}\nAnswer:",
        512,
        metrics.rouge_l,
    ),
    "multi_news": Dataset(
        "You are given several news passages. Write a one-page summary of all news. \n\n"
        "News:\n{context}\n\nNow, write a one-page summary of all the news.\n\nSummary:",
        512,
        metrics.rouge_l,
    ),
    "vcsum": Dataset(
        "下面有一段会议记录，请你阅读后，写一段总结，总结会议的内容。\n会议记录：\n{context}\n\n会议总结：",
        512,
        metrics.rouge_l_zh,
    ),
    "trec": _few_shot(
        "Please determine the type of the question below. Here are some examples of questions.\n\n{context}\n{input}",
        64,
        metrics.classification,
    ),
    "triviaqa": _few_shot(
        f"Answer the question based on the given passage. {_ONLY} The following are some examples.\n\n"
        "{context}\n\n{input}",
        32,
        metrics.f1,
    ),
    "samsum": _few_shot(
        "Summarize the dialogue into a few short sentences. The following are some examples.\n\n{context}\n\n{input}",
        128,
        metrics.rouge_l,
    ),
    "lsht": _few_shot("请判断给定新闻的类别，下面是一些例子。\n\n{context}\n{input}", 64, metrics.classification),
    "passage_count": Dataset(
        "There are some paragraphs below sourced from Wikipedia. Some of them may be duplicates. Please carefully "
        "read these paragraphs and determine how many unique paragraphs there are after removing duplicates. In "
        "other words, how many non-repeating paragraphs are there in total?\n\n{context}\n\nPlease enter the final "
        "count of unique paragraphs after removing duplicates. The output format should only contain the number, "
        "such as 1, 2, 3, and so on.\n\nThe final answer is: ",
        32,
        metrics.count,
    ),
    "passage_retrieval_en": Dataset(
        "Here are 30 paragraphs from Wikipedia, along with an abstract. Please determine which paragraph the "
        "abstract is from.\n\n{context}\n\nThe following is an abstract.\n\n{input}\n\nPlease enter the number of "
        'the paragraph that the abstract is from. The answer format must be like "Paragraph 1", "Paragraph 2", '
        "etc.\n\nThe answer is: ",
        32,
        metrics.retrieval,
    ),
    "passage_retrieval_zh": Dataset(
        "以下是若干段落文字，以及其中一个段落的摘要。请确定给定的摘要出自哪一段。\n\n{context}\n\n"
        "下面是一个摘要\n\n{input}\n\n"
        '请输入摘要所属段落的编号。答案格式必须是"段落1"，"段落2"等格式\n\n答案是：',
        32,
        metrics.retrieval,
    ),
    "lcc": _code("Please complete the code given below. \n{context}Next line of code:\n"),
    "repobench-p": _code("Please complete the code given below. \n{context}{input}Next line of code:\n"),
}

# LongBench-E: the datasets of which the authors drew items evenly over three lengths.
EVEN = (
    *("qasper", "multifieldqa_en", "hotpotqa", "2wikimqa", "gov_report", "multi_news", "trec", "triviaqa", "samsum"),
    *("passage_count", "passage_retrieval_en", "lcc", "repobench-p"),
)

V2 = Dataset(
    "Please read the following text and answer the question below.\n\n<text>\n{context}\n</text>\n\n"
    "What is the correct answer to this question: {question}\nChoices:\n"
    "(A) {choice_A}\n(B) {choice_B}\n(C) {choice_C}\n(D) {choice_D}\n\n"
    'Format your response as follows: "The correct answer is (insert answer here)".',
    128,
    metrics.choice,
    settled=metrics.choice_made,
)
