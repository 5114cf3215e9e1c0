"""Word lists, ours, for the metrics of language and sentiment.

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
    amazing awesome beautiful beautifully beauty best better blessed bliss bright brighten
    brilliant calm celebrate celebrated celebrating celebration charming cheer cheerful cheerfully
    cheers comfort comfortable confident cozy creative cute delicious delight delighted delightful
    eager elegant encourage encouraged encouraging energetic enjoy enjoyable enjoyed enjoying
    enjoyment enjoys enthusiasm enthusiastic excellent excited excitement exciting exquisite
    fabulous fantastic fascinating festive flourish fortunate fortunately friend
    friendly friends friendship fun generous genius gentle gift glad gladly glorious good gorgeous
    grace graceful grateful gratitude great happier happily happiness happy harmony healthy helpful
    hooray hope hopeful hopefully hug ideal impressive incredible inspire inspired inspiring joy
    joyful joyous kindness laugh laughing laughter lively love loved lovely loves loving lucky
    magical magnificent marvelous marvellous memorable nice optimistic outstanding peace peaceful
    perfect perfectly playful pleasant pleased pleasure positive precious proud rejoice relax
    relaxed remarkable reward rewarding safe satisfied satisfying smile smiles smiling
    spectacular splendid stunning succeed success successful sunny sunshine superb superbly sweet
    terrific thank thankful thanks thrilled thrilling thrive treasure triumph vibrant warm
    warmth welcome win winning wonderful wonderfully wow yay yummy
    """
)

NEGATIVE = _listed(
    """
    abandoned abuse afraid agony alas alone anger angry anguish annoyed annoying anxiety anxious
    ashamed awful bad badly bitter bitterness bleak boring broken burden cruel cruelty cry
    crying damage damaged danger dangerous dark darkness dead death decay defeat defeated depressed
    depressing depression despair desperate destroy destroyed destruction die died dies difficult
    dirty disappoint disappointed disappointing disappointment disaster disgusting dismal doom
    doomed dread dreadful dreary dull dying empty emptiness endless enemy evil exhausted fail
    failed failing fails failure fear fearful fears filthy foolish forgotten frightened frustrated
    frustrating frustration futile ghastly gloom gloomy grave grief grieve grim guilt guilty
    harm harmful harsh hate hated hateful hatred haunted heartbreak heartbroken helpless
    hopeless hopelessly horrible horror hurt hurts injury insult jealous joyless
    lonely lose loneliness loser losing loss lost mediocre meaningless melancholy miserable misery
    mistake mourn nasty nightmare pain painful pathetic pity pointless poor problem problems
    regret reject rejected ruin ruined sad sadly sadness scared selfish shame sick sickness sorrow
    sorry struggle stupid suffer suffered suffering tears tedious terrible terribly threat tired
    tragedy tragic trouble ugly unfortunate unfortunately unhappy unpleasant upset useless vain
    violence violent waste weak weary weep wicked worried worry worse worst worthless wound wrong
    """
)

# These, and any word that ends in n't, turn the words that follow them around.
NEGATIONS = _listed(
    """
    not no never none nobody nothing neither nor without hardly barely cannot lack lacks lacking
    """
)
