"""Word lists, ours, for the metrics of language, sentiment, hedging and formality.

All words are casefolded, with ' as the apostrophe. Knows nothing of how they are counted.
"""

from __future__ import annotations


def _listed(text: str) -> frozenset[str]:
    return frozenset(text.split())


# The commonest words that carry grammar, by language code. A word that two languages share
# stands in both lists, so that it counts for neither. A word that ends in ' is an elision:
# l' is the first part of l'eau.
FUNCTION_WORDS: dict[str, frozenset[str]] = {
    "en": _listed(
        """
        the a an and or but if of to in on at by for from with as is are was were be been am it
        its he she they we you i me my your his her their our this that these those there which
        who what when where how why not no do does did has have had can could will would should
        may might so than then into about also because while such more most it's i'm i've don't
        that's you're can't doesn't isn't there's we're let's they're
        """
    ),
    "fr": _listed(
        """
        le la les un une des du de et ou mais donc que qui quoi dont où si ne pas plus est sont
        était être été a ont avoir il elle ils elles on nous vous je tu me te se ce cette ces
        cet son sa ses leur leurs mon ma mes votre notre vos nos dans sur sous pour par avec sans
        en au aux comme aussi très peut fait entre lorsque parce afin oui l' d' qu' j' c' n' s' m'
        """
    ),
    "de": _listed(
        """
        der die das den dem des ein eine einen einem einer eines und oder aber wenn weil dass ob
        ist sind war waren sein wird werden wurde hat haben hatte kann können muss ich du er sie
        es wir ihr ihre sich mich mir nicht kein keine auch nur noch schon sehr so wie was wer in
        im an am auf aus bei mit nach von vom zu zum zur für über unter durch als um man ja
        """
    ),
    "es": _listed(
        """
        el la los las un una unos unas de del y e o pero si que quien qué cuando donde no es son
        era ser está están estar fue ha han hay se me te le les lo nos yo tú él ella ellos usted
        su sus mi mis tu este esta estos estas ese esa eso en con por para sin sobre entre desde
        hasta al a como más muy también porque puede ya cada sí
        """
    ),
    "it": _listed(
        """
        il lo la i gli le un uno una di del della dei delle dello degli e ed o ma se che chi cui
        quando dove non è sono era essere stato ha hanno ho si mi ti ci vi ne io tu lui lei noi
        suo sua suoi loro mio questo questa questi queste quello in nel nella nei nelle con per
        da dal dalla su sul sulla al alla ai alle a come più molto anche perché può sì tra fra
        l' un' d' c' dell' all' nell' dall' sull' quest'
        """
    ),
    "pt": _listed(
        """
        o a os as um uma uns umas de do da dos das e ou mas se que quem quando onde não é são era
        ser está estão estar foi há tem têm me te lhe nos eu tu ele ela eles elas você seu sua
        seus suas meu minha este esta esse essa isso em no na nos nas com por pelo pela para sem
        sobre entre desde até ao à aos às como mais muito também porque pode já cada sim
        """
    ),
}

POSITIVE = _listed(
    """
    admirable admire adorable adore adored adores agreeable amazing appreciate appreciated
    awesome beautiful beautifully beauty best better blessed bliss blissful bright brighten
    brilliant calm celebrate celebrated celebrating celebration charming cheer cheerful
    cheerfully cheers cheery comfort comfortable confident congratulations content cosy cozy
    creative cute delicious delight delighted delightful delights eager ecstatic elated elegant
    encourage encouraged encouraging energetic enjoy enjoyable enjoyed enjoying enjoyment enjoys
    enthusiasm enthusiastic euphoric excellent excited excitement exciting exquisite fabulous
    fantastic fascinating festive flourish fortunate fortunately friend friendly friends
    friendship fun funny generous genius gentle gift glad gladly glorious good gorgeous grace
    graceful grateful gratitude great happier happily happiness happy harmony healthy helpful
    hilarious honored honoured hooray hope hopeful hopefully hug ideal impressive incredible
    inspire inspired inspiring jolly joy joyful joyous jubilant kindness laugh laughing laughter
    lively love loved lovely loves loving lucky magical magnificent marvellous marvelous
    memorable merry nice optimistic outstanding overjoyed peace peaceful perfect perfectly
    playful pleasant pleased pleasing pleasure positive precious proud radiant refreshing
    rejoice relax relaxed relief relieved remarkable reward rewarding safe satisfied satisfying
    serene smile smiles smiling soothing spectacular splendid stunning succeed success
    successful sunny sunshine superb superbly sweet terrific thank thankful thanks thrilled
    thrilling thrive treasure treat triumph vibrant victorious victory warm warmth welcome win
    winning wonderful wonderfully wow yay yummy
    """
)

NEGATIVE = _listed(
    """
    abandoned abuse afflicted afraid agony alas alone anger angry anguish annoyed annoying
    anxiety anxious appalling ashamed atrocious awful bad badly betrayed bitter bitterness blame
    blamed bleak bored boring broken burden cries cruel cruelty cry crying cursed damage damaged
    damn danger dangerous dark darkness dead death decay defeat defeated defective depressed
    depressing depression despair desperate despise destroy destroyed destroys destruction die
    died dies difficult dirty disappoint disappointed disappointing disappointment disaster
    disgrace disgusted disgusting dislike disliked dismal displeased distress doom doomed dread
    dreadful dreads dreary dull dying emptiness empty endless enemy evil exhausted fail failed
    failing fails failure fatal fault fear feared fearful fears filthy foolish forgotten
    frightened frustrated frustrating frustration futile ghastly gloom gloomy grave grief grieve
    grieving grim guilt guilty harm harmful harsh hate hated hateful hatred haunted heartache
    heartbreak heartbroken helpless hideous hopeless hopelessly horrible horror hostile
    humiliated hurt hurts injury insult insulting jealous joyless lame loneliness lonely lose
    loser losing loss lost lousy mean meaningless mediocre melancholy miserable miserably misery
    mistake mourn nasty nightmare offended offensive outrage pain painful pathetic pity
    pointless poor problem problems rage regret reject rejected resent rotten rude ruin ruined
    sad sadly sadness scared selfish shame sick sickness sobbing sorrow sorry struggle stupid
    sucks suffer suffered suffering tears tedious terrible terribly terrified threat tired
    tormented tragedy tragic trouble ugly unbearable unfair unfortunate unfortunately unhappily
    unhappy unlucky unpleasant upset useless vain vile violence violent waste weak weary weep
    wicked worried worry worrying worse worst worthless wound wretched wrong
    """
)

# These, and any word that ends in n't, turn the words that follow them around.
NEGATIONS = _listed(
    """
    not no never none nobody nothing neither nor without hardly barely cannot lack lacks lacking
    """
)

# Words and phrases that hold back from stating a thing as certain. Any case.
HEDGES = tuple(
    " ".join(phrase.split())
    for phrase in """
    perhaps, maybe, might, may, could, possibly, probably, presumably, apparently, arguably,
    roughly, approximately, somewhat, sometimes, often, usually, generally, typically, seem,
    seems, seemed, appear to, appears to, likely, unlikely, tend to, tends to, suggests, suggest
    that, i think, i guess, i believe, i suppose, i assume, in my opinion, not sure, uncertain,
    unclear, unsure, hard to say, it depends, depends on, depending on, to some extent, in some
    cases, more or less, sort of, kind of, it is possible, it's possible, as far as i know
    """.split(",")
)

# Words of speech among friends; contractions and pronouns of I and you are counted beside them.
INFORMAL = _listed(
    """
    ain't anyway anyways awesome bloke bucks buddy bunch cause cool cos crap crazy
    cute dude dunno folks fun funny get gets getting go goes going gonna got gotta guess guy
    guys haha heck hell hey hi huge just kid kidding kids kinda lame lol lots
    maybe mess nah nope oh ok okay oops pal pretty really sorta stuff super sure
    thanks thing things though totally ugh wanna whatever wow yay yeah yep yes yo yup
    """
)
FORMAL = _listed(
    """
    accordingly additionally albeit commence commonly concerning consequently constitute
    constitutes derive derived desire endeavor endeavour ensure entail facilitate furthermore
    hence henceforth herein hereby inasmuch inquire kindly moreover nevertheless nonetheless
    notwithstanding numerous obtain one's particularly permit pertaining possess possesses
    previously prior provided purchase regarding reside residing respectively shall solely
    subsequent subsequently sufficient thereby therein thereof therefore thus upon utilize utilized
    utilizing utmost various whereas whereby wherein whilst whom
    """
)
FIRST_AND_SECOND_PERSON = _listed(
    """
    i me my mine myself you your yours yourself we us our ours ourselves
    """
)
# Endings of words that English took from Latin and Greek; counted on words of 8 letters or more.
LEARNED_ENDINGS = (
    *("tion", "tions", "sion", "sions", "ment", "ments", "ance", "ances", "ence", "ences"),
    *("ity", "ities", "ive", "ively", "ical", "ically", "ious", "iously", "ate", "ated", "ates"),
    *("ology", "ism", "ative", "ible", "ibly", "uous", "ture", "ary", "ancy", "ency"),
)
